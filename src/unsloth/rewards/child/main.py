"""Entry of the sandbox's process: ``python -I -S -E main.py`` with one socket as descriptor 0."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import serve  # type: ignore[import-not-found]  # noqa: E402

if __name__ == "__main__":
    serve.main()
