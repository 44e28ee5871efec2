"""Pictures for people: heat maps, reports, the demo page."""
