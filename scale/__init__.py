"""Many ranks and big models: agreement, sharding, checkpoints, log, plan, faster sampling."""
