"""Reading and writing weights: files, layouts of names, filling of modules and shards, the hub."""
