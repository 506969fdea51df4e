"""Stage `ppo`: the RL-CAI policy."""
