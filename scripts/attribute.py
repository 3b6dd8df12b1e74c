"""`hf-trak attribute` as a script: `accelerate launch scripts/attribute.py INDEX --queries ... --output ...`."""

import sys

from hf_trak.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["attribute", *sys.argv[1:]]))
