"""The story of the platform in five steps, told with real traffic; every claim that it makes is checked."""
