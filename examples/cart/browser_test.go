package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

var update = flag.Bool("update", false, "write the screenshots in testdata")

// browser is a page in Chromium.
type browser struct {
	t   *testing.T
	ctx context.Context

	mu         sync.Mutex
	complaints []string // what the page or the browser wrote to the console as an error
}

// openBrowser starts Chromium, which ends with the test, or skips the test where there is none.
func openBrowser(t *testing.T) *browser {
	t.Helper()
	path := chromium()
	if path == "" {
		t.Skip("no Chromium: install Debian's package chromium, or Google Chrome, to run this test")
	}
	allocator, cancel := chromedp.NewExecAllocator(t.Context(),
		chromedp.ExecPath(path),
		chromedp.UserDataDir(t.TempDir()),
		chromedp.NoFirstRun,
		chromedp.NoSandbox, // Chromium's own sandbox is not to be had in most containers
		chromedp.DisableGPU,
		chromedp.Headless,
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-background-networking", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-sync", true),
	)
	t.Cleanup(cancel)
	ctx, cancel := chromedp.NewContext(allocator)
	t.Cleanup(cancel)
	ctx, cancel = context.WithTimeout(ctx, 3*time.Minute)
	t.Cleanup(cancel)
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil && ctx.Err() == nil {
			t.Errorf("Chromium does not end: %v", err)
		}
	})

	b := &browser{t: t, ctx: ctx}
	messages := chromedp.Console(ctx)
	go func() {
		for m, err := range messages {
			if err == nil {
				b.listen(m)
			}
		}
	}()
	return b
}

func chromium() string {
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

// listen collects exceptions and refusals, of the content security policy for example. A failed request is none: in
// these races some are meant to fail.
func (b *browser) listen(m chromedp.ConsoleMessage) {
	bad := m.IsException() || m.Type == chromedp.ConsoleError
	if bad && m.Source != "network" {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.complaints = append(b.complaints, m.Text)
	}
}

func (b *browser) wantNoComplaints() {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.complaints {
		b.t.Errorf("the browser complains: %s", c)
	}
}

func (b *browser) do(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b.ctx, actions...); err != nil {
		b.t.Fatal(err)
	}
}

// ask returns what an action returns.
func ask[T any](b *browser, action chromedp.Action[T]) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, action)
	if err != nil {
		b.t.Fatal(err)
	}
	return v
}

func (b *browser) text(selector chromedp.CSS) string {
	b.t.Helper()
	return strings.TrimSpace(ask(b, chromedp.Text(selector)))
}

func (b *browser) want(selector chromedp.CSS, text string) {
	b.t.Helper()
	if got := b.text(selector); got != text {
		b.t.Errorf("%s shows %q, want %q", selector, got, text)
	}
}

func (b *browser) number(selector chromedp.CSS) int {
	b.t.Helper()
	n, err := strconv.Atoi(b.text(selector))
	if err != nil {
		b.t.Errorf("%s shows no number: %v", selector, err)
	}
	return n
}

// becomes waits until the page shows that text there.
func (b *browser) becomes(selector chromedp.CSS, text string) {
	b.t.Helper()
	condition := fmt.Sprintf("document.querySelector(%q)?.textContent.trim() === %q", selector, text)
	if _, err := chromedp.Run(b.ctx, chromedp.Poll[chromedp.Void](condition)); err != nil {
		b.t.Fatalf("%s never shows %q: %v", selector, text, err)
	}
}

// race presses the button of a race and waits for its end.
func (b *browser) race(id string, times int) {
	b.t.Helper()
	b.do(chromedp.Click(chromedp.CSS("#"+id+" .go"), chromedp.NodeEnabled))
	b.raceEnds(id, times)
}

// raceEnds waits for the end of a race.
func (b *browser) raceEnds(id string, times int) {
	b.t.Helper()
	section := chromedp.CSS("#" + id)
	over := fmt.Sprintf("document.querySelector('%s[data-done=\"%d\"], %s[data-broken]') !== null", section, times, section)
	ask(b, chromedp.Poll[chromedp.Void](over, chromedp.WithPollingTimeout(90*time.Second)))
	b.t.Logf("%s: %s", id, b.text(section+" .verdict"))
	if ask(b, chromedp.Evaluate[int](fmt.Sprintf("document.querySelectorAll('%s[data-broken]').length", section))) > 0 {
		b.t.Fatalf("%s broke off", id)
	}
}

// call sends a command for which chromedp has no action.
func call[P, R any](b *browser, command cdp.Command[P, R], params P) {
	b.t.Helper()
	if _, err := chromedp.Call(b.ctx, command, params); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) phone() {
	b.do(chromedp.EmulateViewport(360, 740, chromedp.EmulateMobile))
}

func (b *browser) desktop() {
	b.do(chromedp.EmulateViewport(1280, 900))
}

func (b *browser) scheme(name string) {
	call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
		{Name: "prefers-color-scheme", Value: name},
		{Name: "prefers-reduced-motion", Value: "reduce"}, // so that nothing is caught on its way
	}})
}

func TestRacesInBrowser(t *testing.T) {
	b := openBrowser(t)
	cfg := config{members: 3}
	if *update {
		cfg.addr = "localhost:4000" // as in the documentation
	}
	s := open(t, cfg)
	b.desktop()
	b.scheme("light")
	b.do(chromedp.Navigate(s.urls[0]))

	b.race("storm", 1)
	b.wantAllKept("storm")
	plain := b.number(`#storm .plain [data-field="kept"]`)
	if plain >= stormSize {
		t.Errorf("the plain store kept %d", plain)
	}
	if got := b.number(`#storm .plain [data-field="leases"]`); got <= servers {
		t.Errorf("the plain store made %d leases", got)
	}
	if got := b.number(`#storm .ours [data-field="leases"]`); got > servers {
		t.Errorf("etcdstore made %d leases", got)
	}
	b.wantCells(`#storm .plain .kept`, plain)
	b.wantCells(`#storm .plain .lost`, stormSize-plain)

	b.race("logout", 1)
	b.want(`#logout .plain [data-field="who"]`, "Logged in again")
	b.want(`#logout .ours [data-field="who"]`, "Stays logged out")
	b.want(`#logout .plain [data-field="saved"]`, strconv.Itoa(lateSize))
	b.want(`#logout .ours [data-field="refused"]`, strconv.Itoa(lateSize))

	b.race("leader", 1)
	b.wantAllKept("leader")

	// Again, and from another server's page.
	b.race("storm", 2)
	b.wantAllKept("storm")
	b.addFromShelf()
	b.screenshots()
	b.do(chromedp.Navigate(s.urls[2]))
	b.race("storm", 1)
	b.wantAllKept("storm")
	b.wantNoComplaints()
}

func (b *browser) wantAllKept(id string) {
	b.t.Helper()
	for _, store := range []string{"plain", "ours"} {
		lane := chromedp.CSS("#" + id + " ." + store + " ")
		b.t.Logf("%s %s: %s kept, %s failed, %s leases, %s", id, store, b.text(lane+`[data-field="kept"]`),
			b.text(lane+`[data-field="failed"]`), b.text(lane+`[data-field="leases"]`), b.text(lane+`[data-field="time"]`))
	}
	ours := chromedp.CSS("#" + id + " .ours ")
	b.want(ours+`[data-field="kept"]`, strconv.Itoa(stormSize))
	b.want(ours+`[data-field="failed"]`, "0")
	b.wantCells(ours+".cells .kept", stormSize)
}

func (b *browser) wantCells(selector chromedp.CSS, want int) {
	b.t.Helper()
	got := ask(b, chromedp.Evaluate[int](fmt.Sprintf("document.querySelectorAll(%q).length", selector)))
	if got != want {
		b.t.Errorf("%d squares are %s, want %d", got, selector, want)
	}
}

// addFromShelf puts something into the cart, so that the pictures show a cart that is used.
func (b *browser) addFromShelf() {
	b.t.Helper()
	b.press("Add one: Apples")
	b.becomes(`[data-count="apple"]`, "1")
	b.press("Add one: Apples")
	b.becomes(`[data-count="apple"]`, "2")
	b.press("Add one: Coffee")
	b.becomes(`[data-field="count"]`, "3 items")
	b.do(chromedp.SendKeys(chromedp.CSS("#name"), "Ada\r"))
	b.becomes(`[data-field="user"]`, "Ada")
}

func (b *browser) press(label string) {
	b.t.Helper()
	b.do(chromedp.Click(chromedp.CSS(fmt.Sprintf("button[aria-label=%q]", label)), chromedp.NodeEnabled))
}

// screenshots takes the pictures in testdata, if asked to, with what the races showed.
func (b *browser) screenshots() {
	b.t.Helper()
	for _, scheme := range []string{"light", "dark"} {
		b.scheme(scheme)
		ask(b, chromedp.Evaluate[chromedp.Void]("document.activeElement.blur(); scrollTo(0, 0)"))
		png := ask(b, chromedp.FullScreenshot(100))
		if !*update {
			continue
		}
		if err := os.WriteFile(filepath.Join("testdata", scheme+".png"), png, 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
}

func TestCartInBrowser(t *testing.T) {
	b := openBrowser(t)
	s := open(t, config{members: 1})
	b.phone()
	b.do(chromedp.Navigate(s.urls[1]))
	b.addFromShelf()
	b.want(`[data-field="count"]`, "3 items")

	// The keyboard stays where it was: Enter presses the same button again, until it has nothing left to do.
	b.press("Remove one: Apples")
	b.becomes(`[data-count="apple"]`, "1")
	b.do(chromedp.KeyEvent("\r"))
	b.becomes(`[data-count="apple"]`, "0")
	b.do(chromedp.KeyEvent("\r")) // the focus has moved on to "Add one"
	b.becomes(`[data-count="apple"]`, "1")

	b.do(chromedp.Click(chromedp.CSS(`form[action="/logout"] button`)))
	b.becomes(`[data-field="count"]`, "0 items")

	// One member: the leader can not be killed, and the page says why.
	disabled := ask(b, chromedp.Evaluate[bool](`document.querySelector("#leader .go").disabled`))
	if !disabled || !strings.Contains(b.text("#leader-why"), "-members 3") {
		t.Error("the page offers to kill the only member")
	}
	b.race("storm", 1)
	b.wantAllKept("storm")
	b.wantNoComplaints()
}

func TestCartWithoutScript(t *testing.T) {
	b := openBrowser(t)
	s := open(t, config{members: 1})
	call(b, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	b.phone()
	b.do(chromedp.Navigate(s.urls[0]))
	for range 2 {
		b.loads(chromedp.Click(chromedp.CSS(`button[aria-label="Add one: Honey"]`)))
	}
	b.want(`[data-count="honey"]`, "2")
	b.loads(chromedp.SendKeys(chromedp.CSS("#name"), "Grace\r"))
	b.want(`[data-field="user"]`, "Grace")
	b.want(".lead .notice", "The races need JavaScript. The cart does not.")
	b.wantNoComplaints()
}

// loads does something that makes the browser load a page, and waits for that.
func (b *browser) loads(action chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if _, err := chromedp.RunResponse(b.ctx, action); err != nil {
		b.t.Fatal(err)
	}
}

// TestLook measures what a picture does not prove: nothing sticks out, and all text can be read.
func TestLook(t *testing.T) {
	b := openBrowser(t)
	s := open(t, config{members: 1})
	b.do(chromedp.Navigate(s.urls[0]))
	for _, width := range []int64{320, 360, 768, 1280, 1920} {
		b.do(chromedp.EmulateViewport(width, 800))
		over := ask(b, chromedp.Evaluate[int]("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
		if over > 0 {
			t.Errorf("%d pixels wide, the page is %d too wide", width, over)
		}
	}
	b.do(chromedp.Evaluate[chromedp.Void](`document.querySelector("#storm .go").focus()`))
	b.do(chromedp.KeyEvent("\r"))
	b.raceEnds("storm", 1)
	if !ask(b, chromedp.Evaluate[bool](`document.activeElement === document.querySelector("#storm .go")`)) {
		t.Error("the keyboard's focus has left the button that started the race")
	}
	b.addFromShelf()
	for _, scheme := range []string{"light", "dark"} {
		b.scheme(scheme)
		for _, f := range ask(b, chromedp.Evaluate[[]string](faintText)) {
			t.Errorf("%s: %s", scheme, f)
		}
	}
	b.wantNoComplaints()
}

// faintText lists the elements whose own text has less contrast to what is behind it than WCAG 2.2 asks for (AA: 4.5).
// Disabled controls are exempt there.
const faintText = `(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const over = (behind, color) => {
    canvas.fillStyle = behind;
    canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return 'rgb(' + r + ',' + g + ',' + b + ')';
  };
  const luminance = (color) => {
    const [r, g, b] = color.match(/\d+/g).map((v) => {
      const c = v / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => element
    ? over(background(element.parentElement), getComputedStyle(element).backgroundColor)
    : 'rgb(255,255,255)';
  return [...document.body.querySelectorAll('*')]
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim()))
    .filter((e) => e.checkVisibility() && !e.closest('noscript, script, :disabled'))
    .map((e) => {
      const behind = background(e);
      const [a, b] = [luminance(over(behind, getComputedStyle(e).color)), luminance(behind)].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e];
    })
    .filter(([contrast]) => contrast < 4.5)
    .map(([contrast, e]) => e.localName + '.' + e.className + ' "' + e.textContent.trim() + '": ' + contrast.toFixed(2));
})()`
