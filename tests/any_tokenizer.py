"""llama.cpp's converter for tokenizers that it does not know, such as the embedded teacher's.

Put as `convert_hf_to_gguf.py` beside the converter's own packages, this runs the converter and has it take every
tokenizer for GPT-2's: byte-level as well, but cut by other rules. So the files are good for tokens, not for text, which
is all that comparing logits and timing take. `flashmorph export` refuses such tokenizers.
"""

import shutil
import sys
from pathlib import Path


def stand_in(llama_cpp: Path, place: Path) -> Path:
    """Make `place` a folder that stands for the checkout `llama_cpp`, with this file as its converter."""
    place.mkdir(parents=True)
    (place / "gguf-py").symlink_to((llama_cpp / "gguf-py").resolve())
    shutil.copy(__file__, place / "convert_hf_to_gguf.py")
    return place


if __name__ == "__main__":
    sys.path[0] = str((Path(__file__).parent / "gguf-py").resolve().parent)
    import conversion  # pyright: ignore[reportMissingImports]
    import convert_hf_to_gguf as converter  # pyright: ignore[reportMissingImports]

    conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    converter.main()
