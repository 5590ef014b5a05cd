"""A small PTX machine in numpy: what a Triton kernel compiles to, executed instruction by instruction without a GPU.

``parse`` reads the text, ``translate`` makes Python of what is elementwise, with the numbers of ``arithmetic``.
"""
