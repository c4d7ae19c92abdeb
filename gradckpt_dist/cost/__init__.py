"""What storages cost, measured."""
