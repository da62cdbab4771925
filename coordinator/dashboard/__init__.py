"""What the dashboard's pages show and how they look; routes and forms are in coordinator/api/."""
