import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `import train`, which is a script at the top and not part of the package

os.environ.setdefault('OMP_NUM_THREADS', '2')
