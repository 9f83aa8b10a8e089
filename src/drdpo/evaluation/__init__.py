"""Step 4: averages, spider, leaderboard, report."""
