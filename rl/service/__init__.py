"""The loop and what runs it: protocols, rollouts, weight publishing, placement, the run itself."""
