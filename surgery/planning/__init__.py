"""From targets to a plan; changes nothing."""
