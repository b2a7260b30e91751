"""Numbers from Flax that torchlift must reproduce: see README.md."""
