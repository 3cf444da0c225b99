package route

// Keys gives the keys of a routes file.
func Keys() [][]string {
	return [][]string{routeKeys, matchKeys, pathKeys, upstreamKeys, captureKeys, completionKeys, replayKeys, headerKeys}
}

// Parse reads the routes of data.
func Parse(data []byte, maxBody int64) (*Table, error) { return parse("routes.yaml", data, maxBody) }
