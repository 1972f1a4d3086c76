"""Tensors in, tensors out: the read, the patch and everything captured by the compiler.

Nothing here knows text, files or configuration, and nothing here imports ``brain``.

* ``read.py``: step 1, the forward pass that writes nothing
* ``patch.py``: step 0/4, the only module, beside its twins in ``tick_cpu.cpp`` and
  ``tick_kernels.py``, that writes tensors in place
* ``choose.py``: steps 1 to 3 after the read: next token, brightness, what to cull
* ``chunk.py``: the same of several ticks of a long text
* ``lookup.py``, ``speculate.py``: several tokens per read, where text repeats
* ``graphs.py``: which graphs exist, and proof that there are no others
* ``read_cpu.cpp``, ``draw_cpu.cpp``, ``tick_cpu.cpp``: the read, the draw and, where nothing is
  captured, the rest of a tick on a CPU
* ``read_cuda.py``, ``tick_cuda.py``: the read and most of the rest of a tick as Triton kernels,
  which ``kernel_launch.py`` starts
"""
