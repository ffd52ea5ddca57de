"""``python -m fedunlearn`` is ``fedunlearn``."""

from fedunlearn.cli import main

if __name__ == "__main__":
    main()
