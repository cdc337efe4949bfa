"""What several tests share: tiny models, workspaces, a fake server, made logs."""
