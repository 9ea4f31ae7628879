"""Makes the models that the benchmarks run on.

    python -m benchmarks.models MODEL [--out DIR] [--forms hf,q8_0,bf16]

MODEL: smollm2-135m (the default model, out of chatserve's cache), 1.1b (TinyLlama's shape) or 7b
(Llama 2's) with random weights and smollm2's tokenizer, tiny for a trial. Writes DIR/MODEL/hf
(safetensors in bfloat16) and DIR/MODEL/FORM.gguf for the other forms (bf16, f16, q8_0, q4_0).
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from benchmarks.models.folder import write_folder
from benchmarks.models.gguf_file import FILE_TYPES, write_gguf
from benchmarks.models.sources import DEFAULT_MODEL, SHAPES, default_model_path, open_source
from benchmarks.places import models_folder
from chatserve.models.gguf import GGUFFile


def make_model(name: str, out: Path, forms: list[str]) -> None:
    """Write the `forms` of a model that are not there yet."""
    tokenizer = default_model_path()
    with closing(GGUFFile.open(tokenizer)) as file:
        metadata = file.metadata
    with open_source(name) as source:
        for form in forms:
            target = out / name / ("hf" if form == "hf" else f"{form}.gguf")
            if target.exists():
                print(f"{target} is there", flush=True)
                continue
            unfinished = target.with_name(f"{target.name}.unfinished")
            if form == "hf":
                write_folder(unfinished, source, metadata)
            else:
                write_gguf(unfinished, source, form, tokenizer)
            unfinished.rename(target)
            print(f"{target} written", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=[DEFAULT_MODEL, *SHAPES])
    parser.add_argument("--out", type=Path, default=models_folder())
    parser.add_argument(
        "--forms", default="hf,q8_0,bf16", help=f"comma-separated: hf, {', '.join(FILE_TYPES)}"
    )
    arguments = parser.parse_args()
    make_model(arguments.model, arguments.out, arguments.forms.split(","))


if __name__ == "__main__":
    main()
