"""What teachers say of every view of every image."""
