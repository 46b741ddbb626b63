"""What runs inside the jails: started as a package of its own, it imports nothing from the rest of abba_cli."""
