import sys

from deepfm_ops.cluster.launch import main

if __name__ == "__main__":
    sys.exit(main())
