"""Files of records: what parquet holds is what JSON would, and only the columns asked for are read."""

import pyarrow as pa
import pyarrow.parquet as pq

from gradprobe.common.record_files import open_record_file


def test_parquet_gives_its_records_by_column(tmp_path):
    records = [{"prompt": f"{i}", "ids": [i, 2], "of": {"truth": "3"}} for i in range(3000)]
    table = pa.Table.from_pylist(records)
    table = table.set_column(0, "prompt", table["prompt"].dictionary_encode())
    pq.write_table(table, tmp_path / "sound.parquet", row_group_size=700)
    opened = open_record_file(tmp_path / "sound.parquet", "rollouts")
    assert opened.keys == ["prompt", "ids", "of", "of.truth"]
    assert [record.fields for record in opened.read(opened.keys)] == records
    assert [record.fields for record in opened.read(["of.truth"])] == [{"of": {"truth": "3"}}] * 3000
