-- One member comes by: the same as Board.meet of citadel_gateway/policy/board.py.
--
-- KEYS: the board; its posts by name; their names by version.  Posts are kept apart, as they are
-- most of it, and a member has nearly always seen them all.  ARGV: the time, empty for the server's
-- own; the statement as JSON; how many posts there may be.
-- Returns the time, and the news as JSON.
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local said, most = cjson.decode(ARGV[2]), tonumber(ARGV[3])
local kept = redis.call('GET', KEYS[1])
local board
if kept then
  board = cmsgpack.unpack(kept)
else
  board = {version = 0, members = {}, holders = {}}
  redis.call('DEL', KEYS[2], KEYS[3])
end
-- Nothing holds for longer than what is said now: else a clock has gone back.
if said.lease > 0 then
  for member, till in pairs(board.members) do
    board.members[member] = math.min(till, now + said.lease)
  end
  for _, holder in pairs(board.holders) do holder[2] = math.min(holder[2], now + said.lease) end
end
local function strike(member)
  board.members[member] = nil
  redis.call('HDEL', KEYS[2], member)
  redis.call('ZREM', KEYS[3], member)
end
for member, till in pairs(board.members) do
  if till <= now then strike(member) end
end
for task, holder in pairs(board.holders) do
  if holder[2] <= now or holder[1] == said.member then board.holders[task] = nil end
end
if not next(board.members) then redis.call('DEL', KEYS[2], KEYS[3]) end  -- of those who have gone
local emptied = said.seen > board.version or said.seen > 0 and not board.members[said.member]
local won = {}
if said.lease > 0 then
  board.members[said.member] = now + said.lease
  for _, task in ipairs(said.claims) do
    if not board.holders[task] then board.holders[task] = {said.member, now + said.lease} end
    if board.holders[task][1] == said.member then won[#won + 1] = task end
  end
else
  strike(said.member)
end
local seen = emptied and 0 or said.seen
for _, post in ipairs(said.posts) do
  board.version = board.version + 1
  redis.call('HSET', KEYS[2], post[1], post[2])
  redis.call('ZADD', KEYS[3], board.version, post[1])
end
if #said.posts > 0 then
  local much = redis.call('ZCARD', KEYS[3]) - most
  if much > 0 then
    for i, name in ipairs(redis.call('ZPOPMIN', KEYS[3], much)) do
      if i % 2 == 1 then redis.call('HDEL', KEYS[2], name) end
    end
  end
end
local new = {}
if board.version > seen then
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. seen, '+inf')) do
    new[name] = redis.call('HGET', KEYS[2], name) or nil
  end
end
local members = 0
for _ in pairs(board.members) do members = members + 1 end
redis.call('SET', KEYS[1], cmsgpack.pack(board), 'EX', 3600)
redis.call('EXPIRE', KEYS[2], 7200)
redis.call('EXPIRE', KEYS[3], 7200)
return {string.format('%.17g', now), cjson.encode({
  version = board.version, members = members, won = won, posts = new, was_emptied = emptied,
})}
