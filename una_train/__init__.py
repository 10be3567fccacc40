"""The trainer: regress the policy's implicit reward onto the explicit reward, with only the policy in memory."""
