import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tiny_models.py: pytest's importlib mode adds no folder
