"""The offline search for plans: which pattern serves which head."""
