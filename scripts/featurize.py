"""`hf-trak featurize` as a script: `accelerate launch scripts/featurize.py --model ... --dataset ... --output ...`."""

import sys

from hf_trak.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["featurize", *sys.argv[1:]]))
