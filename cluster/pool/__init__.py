"""The consolidation pool: DeepSpeed ranks that train and judge candidates together."""
