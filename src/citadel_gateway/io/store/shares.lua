-- One member reports what it needs of several caps: the same as Cap.report of
-- citadel_gateway/policy/shares.py.
--
-- KEYS: caps.  ARGV: the time, empty for the server's own; the member; seconds that the report is
-- good for, 0 if the member leaves; seconds of grace; then for each cap its size, what the member
-- goes by or -1, what it uses, and what it wants.
-- Returns the time; then for each cap the limit, what is held, and 1 if others wait for more.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local me, lease, grace = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local function due(shares, size)
  local mine, needs, left = shares[me], {}, size
  for _, share in pairs(shares) do
    needs[#needs + 1] = share.need
    left = left - share.need
  end
  local count, even = #needs, 0
  if left >= 0 then return mine.need + math.floor(left / (2 * count)) end
  table.sort(needs)
  left = size
  for _, need in ipairs(needs) do
    even = math.floor(left / count)
    if need > even then break end
    left, count = left - need, count - 1
  end
  if mine.need <= even then return mine.need end
  local before = 0
  for member, share in pairs(shares) do
    if share.need > even then
      local comes = share.held < mine.held
      if share.held == mine.held then
        comes = share.since < mine.since or share.since == mine.since and member < me
      end
      if comes then before = before + 1 end
    end
  end
  return even + (before < left - even * count and 1 or 0)
end

local reply = {string.format('%.17g', now)}
for i, key in ipairs(KEYS) do
  local kept = redis.call('GET', key)
  local cap = kept and cmsgpack.unpack(kept) or {lost_at = 0, shares = {}}
  local shares = cap.shares
  for member, share in pairs(shares) do
    if share['until'] <= now then shares[member] = nil end
  end
  if lease > 0 then
    local at = 5 + 4 * (i - 1)
    local size, goes_by = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
    local used, wants = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    local mine = shares[me]
    if not mine then
      mine = {held = math.max(goes_by, 0), since = now}
      if goes_by >= 0 then cap.lost_at = now end
    end
    local had = mine.held
    mine.need, mine['until'] = used + wants, now + lease
    if wants == 0 then mine.since = now end
    shares[me] = mine
    local free, waiting = size, false
    for member, share in pairs(shares) do
      if member ~= me then
        free = free - share.held
        waiting = waiting or share.need > share.held
      end
    end
    local limit = math.max(0, math.min(due(shares, size), free))
    if now < cap.lost_at + grace then limit = math.min(limit, had) end
    mine.held = math.max(used, limit, math.min(goes_by, had))
    if mine.held ~= had then mine.since = now end
    reply[#reply + 1] = limit
    reply[#reply + 1] = mine.held
    reply[#reply + 1] = waiting and 1 or 0
  else
    shares[me] = nil
  end
  redis.call('SET', key, cmsgpack.pack(cap), 'EX', 3600)
end
return reply
