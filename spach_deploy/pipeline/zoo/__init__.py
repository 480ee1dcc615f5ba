"""`spach-export --zoo`: many exports by one command (models x precisions x GPUs), each in a process of its own."""
