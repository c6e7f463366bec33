"""What `gptj-dist doctor` does: gathers facts on all nodes, and finds in them what keeps a pipeline from serving."""
