"""llama.cpp as a command, by way of llama-cpp-python: says what follows a text.

``python llama_cpp_command.py GGUF PROMPT TOKENS CONTEXT THREADS``. It imports nothing of this
program: the start of the process is part of what is timed. Tokens are drawn as llama-cpp-python
draws them where nothing is said, and an end of the text does not end it.
"""

import importlib
import sys
from itertools import islice
from typing import Any


def main() -> int:
    """Speaks on standard output, token by token; the exit status."""
    path, prompt, *numbers = sys.argv[1:]
    tokens, context, threads = map(int, numbers)
    library: Any = importlib.import_module("llama_cpp")
    llama = library.Llama(
        path,
        n_gpu_layers=-1,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    ids = llama.tokenize(prompt.encode())
    for token in islice(llama.generate(ids), tokens):
        sys.stdout.buffer.write(llama.detokenize([token]))
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
