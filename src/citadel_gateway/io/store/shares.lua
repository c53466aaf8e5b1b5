-- One member reports what it needs of several caps: the same as Cap.report of
-- citadel_gateway/policy/shares.py.
--
-- KEYS: caps.  ARGV: the time, empty for the server's own; the member; seconds that the report is
-- good for, 0 if the member leaves; seconds of grace; then for each cap its size, what the member
-- goes by or -1, what it uses, and what it wants.
-- Returns the time; then for each cap the limit, what is held, and 1 if others wait for more.
--
-- A cap is kept as one list for each of a share's fields, as reading a table for each member would
-- take most of the time.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local me, lease, grace = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

-- The cap without those whose time is over, and without this member; what is known of it; and
-- whether nobody has reported for half a lease.
local function others_of(cap)
  local left, mine = {lost_at = math.min(cap.lost_at, now), who = {}, held = {}, need = {}, since = {}, till = {}}
  local count, heard = 0, 0
  for i, member in ipairs(cap.who) do
    -- A clock that has gone back makes nobody live longer.
    if lease > 0 then cap.till[i] = math.min(cap.till[i], now + lease) end
    heard = math.max(heard, cap.till[i] - lease)
    if cap.till[i] > now then
      if member == me then
        mine = {held = cap.held[i], since = cap.since[i]}
      else
        count = count + 1
        left.who[count], left.held[count], left.need[count] = member, cap.held[i], cap.need[i]
        left.since[count], left.till[count] = cap.since[i], cap.till[i]
      end
    end
  end
  return left, mine, now - heard > lease / 2
end

local function due(others, mine, size)
  local needs, left = {mine.need}, size - mine.need
  for i, need in ipairs(others.need) do
    needs[i + 1] = need
    left = left - need
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
  for i, need in ipairs(others.need) do
    if need > even then
      local held, since = others.held[i], others.since[i]
      local comes = held < mine.held
      if held == mine.held then
        comes = since < mine.since or since == mine.since and others.who[i] < me
      end
      if comes then before = before + 1 end
    end
  end
  return even + (before < left - even * count and 1 or 0)
end

local reply = {string.format('%.17g', now)}
for i, key in ipairs(KEYS) do
  local kept = redis.call('GET', key)
  local cap = kept and cmsgpack.unpack(kept)
    or {lost_at = 0, who = {}, held = {}, need = {}, since = {}, till = {}}
  local others, mine, silent = others_of(cap)
  if lease > 0 then
    local at = 5 + 4 * (i - 1)
    local size, goes_by = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
    local used, wants = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
    if not mine then
      mine = {held = math.max(goes_by, 0), since = now}
      silent = true
    end
    if silent and goes_by >= 0 then others.lost_at = now end
    local had = mine.held
    mine.need = used + wants
    if wants == 0 then mine.since = now end
    local free, waiting = size, false
    for j, held in ipairs(others.held) do
      free = free - held
      waiting = waiting or others.need[j] > held
    end
    local limit = math.max(0, math.min(due(others, mine, size), free))
    if now < others.lost_at + grace then limit = math.min(limit, had) end
    mine.held = math.max(used, limit, math.min(goes_by, had))
    if mine.held ~= had then mine.since = now end
    local last = #others.who + 1
    others.who[last], others.held[last], others.need[last] = me, mine.held, mine.need
    others.since[last], others.till[last] = mine.since, now + lease
    reply[#reply + 1] = limit
    reply[#reply + 1] = mine.held
    reply[#reply + 1] = waiting and 1 or 0
  end
  redis.call('SET', key, cmsgpack.pack(others), 'EX', 3600)
end
return reply
