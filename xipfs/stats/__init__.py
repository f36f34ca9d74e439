"""What can be told about a mount: counters, heat of pages, snapshots."""
