"""Running streams of accesses through the policies, with no mount."""
