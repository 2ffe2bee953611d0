"""Kernels in Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/interpreter

The switch must be set before Triton is imported, so these tests have a process of their own: `pytest` without it skips
this folder, and tests/kernels/test_interpreted.py starts it with it.
"""

import os
import sys
from pathlib import Path

collect_ignore_glob = []
if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.insert(0, str(Path(__file__).parent))
    import bf16

    bf16.install()
else:
    collect_ignore_glob.append("test_*.py")
