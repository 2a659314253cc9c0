"""A tokenizing job in three parts that any executor can run: plan, encode a shard, commit it."""
