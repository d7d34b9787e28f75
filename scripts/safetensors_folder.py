"""Rewrites a .gguf model as a folder of safetensors, which vLLM loads: safetensors_folder.py GGUF FOLDER."""

import sys
from pathlib import Path

import torch
import transformers

from pipeline.models import locate


def main(name: str, folder: str) -> None:
    """Unpack the weights to bfloat16; a model read from GGUF cannot be saved as it is, so they move to a fresh one."""
    path = Path(locate(name, "GGUF"))
    where = {"gguf_file": path.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **where)
    del read.config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path.parent, **where).save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
