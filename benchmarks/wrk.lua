-- What wrk does for the benchmarks: sends one request, byte for byte as given, and prints every latency as JSON.
-- Arguments: the file that holds the request, and the pause in milliseconds between an answer and the next request.
local request_bytes

function init(args)
   local file = assert(io.open(args[1], "rb"))
   request_bytes = file:read("*a")
   file:close()
   local pause_ms = tonumber(args[2])
   if pause_ms > 0 then -- even a pause of nothing costs wrk a timer
      delay = function() return pause_ms end
   end
end

function request()
   return request_bytes
end

function done(summary, latency)
   local values, counts = {}, {}
   for i = 1, #latency do
      local value, count = latency(i)
      values[i], counts[i] = tostring(value), tostring(count)
   end
   local errors = summary.errors
   io.write(string.format(
      '\n{"us": [%s], "counts": [%s], "failed": %d, "seconds": %f}\n',
      table.concat(values, ","), table.concat(counts, ","),
      errors.connect + errors.read + errors.write + errors.status + errors.timeout,
      summary.duration / 1e6
   ))
end
