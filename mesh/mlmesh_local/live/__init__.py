"""What runs, as it tells of itself: Envoy's admin interface, and what services tell by reflection and channelz."""
