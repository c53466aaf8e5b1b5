-- Spends one unit of every bucket of a request, or of none, for many requests at once.
-- The arithmetic is that of citadel_gateway/policy/rate_limit.py and token_lease.py.
--
-- KEYS: buckets.  ARGV: the time, empty for the server's own; then for each request how many
-- buckets, and for each of them its place among KEYS, seconds of one unit, seconds of the whole
-- bucket, when it is full as far as the gateway knows, and how many units to lease besides.
-- Returns the time; then for each request 1 if it was let through, else 0, and for each of its
-- buckets when it is full, and how many units were leased.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local tats, dirty = {}, {}
local reply = {string.format('%.17g', now)}
local at = 2
while at <= #ARGV do
  local count, fits = tonumber(ARGV[at]), true
  at = at + 1
  for i = 0, count - 1 do
    local place, step = tonumber(ARGV[at + 5 * i]), tonumber(ARGV[at + 5 * i + 1])
    local depth, hint = tonumber(ARGV[at + 5 * i + 2]), tonumber(ARGV[at + 5 * i + 3])
    local tat = tats[place]
    if not tat then
      tat = tonumber(redis.call('GET', KEYS[place]) or 0)
    end
    tat = math.min(math.max(tat, hint), now + depth)
    tats[place] = tat
    if math.max(tat - now, 0) + step - depth > 0.000001 then
      fits = false
    end
  end
  reply[#reply + 1] = fits and '1' or '0'
  for i = 0, count - 1 do
    local place, step = tonumber(ARGV[at + 5 * i]), tonumber(ARGV[at + 5 * i + 1])
    local depth, wanted = tonumber(ARGV[at + 5 * i + 2]), tonumber(ARGV[at + 5 * i + 4])
    local units = 0
    if fits then
      local tat = math.max(now, tats[place]) + step
      local start = math.max(tat, now + math.min(0.05, depth * 0.01))
      units = math.max(0, math.min(wanted, math.floor((now + depth / 2 - start) / step / 8)))
      if units > 0 then tat = start + units * step end
      tats[place] = tat
      dirty[place] = true
    end
    reply[#reply + 1] = string.format('%.17g', tats[place])
    reply[#reply + 1] = units
  end
  at = at + 5 * count
end
for place in pairs(dirty) do
  local tat = tats[place]
  redis.call('SET', KEYS[place], string.format('%.17g', tat), 'PX', math.ceil((tat - now) * 1000) + 1000)
end
return reply
