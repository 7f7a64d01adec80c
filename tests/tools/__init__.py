"""Tools of the tests: a PTX interpreter, stand-in GPU drivers, readers of machine code. None of them needs a GPU."""
