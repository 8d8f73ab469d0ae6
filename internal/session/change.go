package session

import (
	"time"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// Read is what a request believes about a session.
type Read struct {
	Image   *Image          // nil: absent
	Rev     int64           // the mod revision at which etcd holds exactly Image; 0: none does, because it was merged
	Version *record.Version // what etcd holds, as far as it is known
}

// ReadOf returns what a request believes that was given v at the time now.
func ReadOf(v *record.Version, now record.Millis) Read {
	return Read{Image: ImageOf(v.Live(now)), Rev: v.Rev, Version: v}
}

// Payload returns the session's data. It must not be changed.
func (r Read) Payload() []byte {
	if r.Image == nil {
		return nil
	}
	return r.Image.payload
}

// Commit is the change of a request that writes its session.
type Commit struct {
	Merger
	Base  *Read // nil: the session was not read, or there is no transaction
	Ours  *Image
	Touch time.Duration // a commit that just moves the expiry by less is not made, mostly
	If    []commit.Precondition
}

var (
	_ commit.Change = (*Commit)(nil)
	_ commit.Change = (*Update)(nil)
)

// Next implements commit.Change: first committer wins, and later ones are merged. Expiry is not a
// logout: what a request has read before it ended goes on with the request's commit, if nobody has
// deleted or replaced it.
func (c *Commit) Next(cur commit.State) (commit.Write, error) {
	w := commit.Write{Value: valueOf(c.Ours), If: c.If}
	if c.lives(cur) {
		cur.Value, cur.Born, w.Renews = cur.Ended, cur.EndedBorn, true
	}
	if !c.merges(cur) {
		return w, nil
	}
	theirs := ImageOf(cur.Value)
	if theirs == nil || c.reborn(cur) {
		return commit.Write{}, goneError(cur)
	}
	merged, err := c.merged(theirs, cur.Now)
	if err != nil {
		return commit.Write{}, err
	}
	if w.Renews { // its own expiry decides
		merged, err = merged.until(max(merged.expiry, c.Ours.expiry))
	}
	w.Value = valueOf(merged)
	return w, err
}

// Direct implements commit.Change: only a merge decodes.
func (c *Commit) Direct(cur commit.State) bool {
	if c.lives(cur) {
		cur.Value, cur.Born = cur.Ended, cur.EndedBorn
	}
	return !c.merges(cur) || cur.Value == nil || c.reborn(cur)
}

// lives reports whether the session that was read is there, and has ended since.
func (c *Commit) lives(cur commit.State) bool {
	return cur.Value == nil && cur.Ended != nil && c.Base != nil && c.Base.Image != nil && c.Base.Version != nil &&
		c.Base.Version.Created == cur.EndedBorn && c.Ours.expiry > cur.Now
}

// merges reports whether the commit cannot be stored as it is.
func (c *Commit) merges(cur commit.State) bool {
	if c.Base == nil || c.Base.Image == nil && cur.Value == nil {
		return false
	}
	return cur.Value == nil || c.reborn(cur) || c.Base.Image == nil || cur.Rev == 0 || cur.Rev != c.Base.Rev
}

// reborn reports whether the session that was read has been deleted since, and another created
// under its token.
func (c *Commit) reborn(cur commit.State) bool {
	return c.Base.Image != nil && c.Base.Version != nil && c.Base.Version.Created != cur.Born
}

// goneError says that there is no session, or that what is there cannot be read.
func goneError(cur commit.State) error {
	if cur.Err != nil {
		return cur.Err
	}
	return ErrGone
}

// merged merges the commit into theirs. What does not decode is a conflict.
func (c *Commit) merged(theirs *Image, now record.Millis) (*Image, error) {
	var b *Contents
	if c.Base.Image != nil {
		var err error
		if b, err = c.Base.Image.Contents(); err != nil {
			return nil, &ConflictError{}
		}
	}
	o, errOurs := c.Ours.Contents()
	t, errTheirs := theirs.Contents()
	if errOurs != nil || errTheirs != nil {
		return nil, &ConflictError{}
	}
	m, err := c.merge(b, o, t)
	if err != nil {
		return nil, err
	}
	expiry := c.expiry(b, o, t, m, theirs.expiry)
	if m == t && (expiry == theirs.expiry || c.withinTouch(theirs.expiry, expiry, now)) {
		return theirs, nil
	}
	return imageWith(c.Ours.codec, m, expiry)
}

// expiry merges the expiry: the side whose deadline holds decides, where deadlines differ, else the
// later one holds.
func (c *Commit) expiry(base, ours, theirs, merged *Contents, theirExpiry record.Millis) record.Millis {
	moved := base != nil && !merged.deadline.Equal(base.deadline)
	switch {
	case !moved || theirExpiry == 0, ours.deadline.Equal(theirs.deadline):
		return max(c.Ours.expiry, theirExpiry)
	case merged.deadline.Equal(ours.deadline):
		return c.Ours.expiry
	}
	return theirExpiry
}

// withinTouch reports whether moving the expiry need not be written: it moves by less than the
// touch interval, and half of the life that it gives is left all the same, so that an interval
// above an idle timeout logs nobody out.
func (c *Commit) withinTouch(from, to, now record.Millis) bool {
	return from != 0 && to >= from && to.Since(from) < c.Touch && to.Since(from) < to.Since(now)/2
}

// Idle reports whether the commit need not be made at all, at the time now: it changes nothing but
// the expiry, and that need not be written.
func (c *Commit) Idle(now record.Millis) bool {
	if c.Touch == 0 || c.Base == nil || c.Base.Image == nil || c.Base.Version == nil {
		return false
	}
	stored := ImageOf(c.Base.Version.Value) // nil where it was deleted since
	return stored != nil && c.withinTouch(stored.expiry, c.Ours.expiry, now) && c.Base.Image.sameContents(c.Ours)
}

// Stored returns what a request believes once its commit of ours has been stored as v: what it
// wrote. Where that was merged with what others wrote, no revision holds exactly that, so the next
// commit merges again and never overwrites.
func Stored(ours *Image, v *record.Version) Read {
	r := Read{Image: ours, Version: v}
	if ImageOf(v.Value) == ours {
		r.Rev = v.Rev
	}
	return r
}

// Changes reports whether the commit changes more than the expiry, as far as that decodes.
func (c *Commit) Changes() bool {
	return c.Base == nil || c.Base.Image == nil || !c.Base.Image.sameContents(c.Ours)
}

// Prepare decodes: the session has company, so a merge is likely.
func (c *Commit) Prepare() {
	_, _ = c.Ours.Contents()
	if c.Base != nil && c.Base.Image != nil {
		_, _ = c.Base.Image.Contents()
	}
}

// Update is the change that a function makes of a session's values.
type Update struct {
	Fn func(values map[string]any) error
}

// Next implements commit.Change.
func (u *Update) Next(cur commit.State) (commit.Write, error) {
	image := ImageOf(cur.Value)
	if image == nil {
		return commit.Write{}, goneError(cur)
	}
	after, err := u.updated(image)
	return commit.Write{Value: valueOf(after)}, err
}

// updated returns what the function makes of an image: the image itself where it changes nothing.
func (u *Update) updated(image *Image) (*Image, error) {
	if image.expiry == 0 {
		return nil, ErrBareExpiry
	}
	payload, err := image.Encode()
	if err != nil {
		return nil, err
	}
	copied, err := NewImage(image.codec, payload, 0).Contents() // which the function may change
	if err != nil {
		return nil, err
	}
	values := copied.values
	if values == nil {
		values = make(map[string]any)
	}
	if err := u.Fn(values); err != nil {
		return nil, ApplicationError{err}
	}
	before, err := image.Contents()
	if err != nil {
		return nil, err
	}
	after := &Contents{deadline: copied.deadline, values: values, raw: true}
	if after.same(before) {
		return image, nil
	}
	return imageWith(image.codec, after, image.expiry)
}

// Direct implements commit.Change.
func (*Update) Direct(cur commit.State) bool { return cur.Value == nil }

// Prepare implements commit.Change.
func (*Update) Prepare() {}
