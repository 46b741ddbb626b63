"""What several devices and machines would do, worked out on paper from shapes, measured rates and assumptions."""
