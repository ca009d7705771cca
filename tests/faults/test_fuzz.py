"""A short run of the fuzzer; 10 minutes of it:  python tests/faults/fuzz.py --seconds 600 --seed 1"""

import fuzz


def test_spoilt_files_are_refused_or_taken_and_never_crash_a_reader(tmp_path):
    tally = fuzz.fuzz(seed=0, keep=tmp_path, cases=600)
    assert tally.crashes == []
    for reader in fuzz.READERS:
        assert tally.outcomes[f"{reader.__name__} refused"] > 50, "the files must be spoilt"
        assert tally.outcomes[f"{reader.__name__} taken"] > 50, "but not all of them"


def test_the_fuzzer_finds_a_reader_that_crashes(tmp_path, monkeypatch, capsys):
    def careless(directory):
        fuzz.json.loads((directory / "dump" / "manifest.json").read_text())["num_positions"]

    monkeypatch.setattr(fuzz, "READERS", (careless,))
    tally = fuzz.fuzz(seed=0, keep=tmp_path, cases=100)
    assert 0 < len(tally.crashes) < 100
    assert len(list(tmp_path.iterdir())) == len(tally.crashes)
    number = tally.crashes[0].split()[3]
    assert fuzz.fuzz(seed=0, keep=tmp_path, cases=1, first=int(number)).crashes[0] == tally.crashes[0]
