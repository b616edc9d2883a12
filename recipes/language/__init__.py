"""What language recipes share."""
