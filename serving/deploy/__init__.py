"""Where a bundle may go: files for Docker, Kubernetes and the clouds, made from it and a few options."""
