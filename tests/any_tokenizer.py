"""llama.cpp's converter for tokenizers that it does not know, such as the embedded teacher's.

Put as `convert_hf_to_gguf.py` beside a link to the package `gguf` of a llama.cpp, this runs the converter of that
llama.cpp and has it take every tokenizer for GPT-2's: byte-level as well, but cut by other rules. So the files are good
for tokens, not for text, which is all that comparing logits and timing take. `flashmorph export` refuses such
tokenizers when it meets the converter itself.
"""

import sys
from pathlib import Path

sys.path[0] = str((Path(__file__).parent / "gguf-py").resolve().parent)

import conversion  # noqa: E402
import convert_hf_to_gguf as converter  # noqa: E402

# Some classes are first tried for a SentencePiece model, which takes a package more.
conversion.TextModel._set_vocab_sentencepiece = conversion.TextModel._set_vocab_gpt2
conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
converter.main()
