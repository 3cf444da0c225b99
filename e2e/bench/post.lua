-- POSTs 1 KiB, and prints the figures as one line of JSON at the end.
wrk.method = "POST"
wrk.body = string.rep("holdfast", 128)
wrk.headers["Content-Type"] = "application/octet-stream"

function done(summary, latency, requests)
  io.write(string.format(
    'BENCH {"requests":%d,"duration_us":%d,"p50_us":%.0f,"p99_us":%.0f,"errors":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status + summary.errors.timeout))
end
