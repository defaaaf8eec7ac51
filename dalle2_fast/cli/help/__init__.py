"""What `--help` adds to argparse, and the completion of a shell."""
