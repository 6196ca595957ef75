"""The words of the demo: subject areas seen in training, subject areas kept for the test, and what their columns hold.

Knows words and nothing else: no SQL, no sentence, no random number. A domain is written as its tables, one a line,

    books: title=title, genre=noir|satire|fantasy, price=5-90, author_id>authors

a column being `name=` a pool of texts below, a list of texts, or a range of whole numbers; `name>table` is a link to
that table's `id`, which every table has. Training and held-out domains share no table name and no column name.
Rejected: one list of names drawn at random for both; the test would then ask about names that were trained.
"""

from __future__ import annotations

POOLS = {
    "title": (
        "silent hidden golden broken crimson quiet secret frozen wandering burning hollow gentle restless velvet",
        "river garden mirror harvest lantern voyage winter compass shadow orchard letter island thunder window bridge",
    ),
    "person": (
        "Anna Minh Clara Tuấn Victor Lan Oscar Hương Felix Trang Nora Bảo Simon Thảo Edith",
        "Nguyễn Walsh Trần Okafor Silva Phạm Meyer Hoàng Rossi Kim Duarte Novak Patel Đặng Larsen",
    ),
    "code": (
        "Alpha Delta Sierra Tango Bravo Falcon Condor Comet Nova Zenith Argo Titan",
        "Seven Nine Twelve North West Prime Major Minor Upper Lower Old New",
    ),
    "nickname": (
        "Brisk Lucky Rusty Misty Sunny Dusty Shiny Grumpy Cosmic Jolly Witty Nimble",
        "Otter Badger Heron Falcon Lynx Walrus Panther Sparrow Beetle Gecko Moose Raven",
    ),
}

TRAIN_DOMAINS = (
    """books: title=title, genre=noir|satire|fantasy|memoir|essay|poetry, price=5-90, pages=80-900, author_id>authors
       authors: name=person, city=Hanoi|Lisbon|Oslo|Huế|Dublin|Prague, born=1900-1995""",
    """songs: song=title, mood=happy|calm|dark|dreamy|angry|tender, seconds=90-480, plays=100-9000, album_id>albums
       albums: title=title, year=1960-2024, studio=Abbey|Sunset|Electric|Harbour|Blackbird|Chapel""",
    """orders: product=title, quantity=1-60, total=10-900, status=paid|open|shipped|returned, buyer_id>buyers
       buyers: name=person, country=Vietnam|Portugal|Norway|Chile|Ghana|Canada, age=18-80, points=0-500""",
    """movies: title=title, rating=10-99, minutes=70-210, language=Thai|French|Hindi|Korean, director_id>directors
       directors: name=person, awards=0-30, origin=Seoul|Paris|Mumbai|Warsaw|Lagos|Lima""",
    """employees: name=person, salary=900-9000, level=junior|senior|lead|intern|principal|trainee, team_id>teams
       teams: team=nickname, budget=1000-99000, floor=1-40, division=research|finance|design|legal|support|sales""",
    """courses: title=title, credits=1-12, room=100-600, teacher_id>teachers
       teachers: teacher=person, subject=algebra|history|biology|music|physics|drawing, tenure=1-40
       students: name=person, grade=1-100, club=chess|drama|robotics|debate|choir|judo, course_id>courses""",
    """flights: number=code, distance=200-9900, seats=40-400, airline_id>airlines, airport_id>airports
       airlines: airline=nickname, fleet=5-300, alliance=skyline|meridian|unity|horizon|compass|orbit
       airports: airport=title, runways=1-8, region=north|south|coast|delta|highland|central""",
    """dishes: dish=title, calories=80-990, taste=sweet|sour|spicy|salty|bitter|smoky, cost=2-60, chef_id>chefs
       chefs: name=person, stars=1-9, hometown=Hội An|Naples|Kyoto|Lyon|Oaxaca|Tbilisi""",
    """games: date=code, goals=0-15, crowd=500-80000, stadium_id>stadiums
       stadiums: stadium=title, capacity=1000-90000, surface=grass|clay|turf|sand|hybrid
       players: name=person, shirt=1-99, position=keeper|defender|winger|striker|sweeper|libero, stadium_id>stadiums""",
    """houses: house=code, rent=200-5000, bedrooms=1-9, style=modern|gothic|colonial|rustic|baroque, street_id>streets
       streets: street=title, length=50-5000, district=Ba Đình|Alfama|Shoreditch|Kreuzberg|Soho|Gion""",
    """cars: model=nickname, mileage=100-99000, color=red|blue|silver|black|white, power=50-600, dealer_id>dealers
       dealers: name=person, discount=1-40, county=Kent|Cork|Essex|Dorset|Antrim|Fife""",
    """photos: title=title, likes=0-9000, filter=sepia|mono|vivid|faded|warm|cool, width=300-8000, camera_id>cameras
       cameras: camera=code, pixels=2-120, brand=Lumen|Optika|Focale|Prisma|Iris|Shutter, weight=100-3000""",
    """projects: project=title, hours=5-900, priority=low|high|urgent|normal|blocked|later, client_id>clients
       clients: client=person, revenue=1000-99000, sector=energy|retail|health|media|mining|travel
       invoices: invoice=code, amount=50-9900, project_id>projects""",
    """trees: nickname=nickname, height=1-90, species=oak|maple|cedar|willow|lotus|banyan, park_id>parks
       parks: park=title, area=2-900, visitors=100-9000, zone=east|west|inner|outer|lakeside|uptown""",
    """trains: number=code, speed=60-350, carriages=2-20, line_id>lines
       lines: line=title, opened=1850-2020, operator=Metra|Reunion|Coastal|Arrow|Union|Vostok, stations=4-60""",
    """articles: headline=title, words=100-5000, topic=science|sport|culture|politics|health|space, editor_id>editors
       editors: name=person, desk=morning|evening|foreign|weekend|night|local, experience=1-40""",
    """apps: title=title, score=1-100, type=puzzle|racing|strategy|arcade, downloads=10-9000, maker_id>makers
       makers: maker=nickname, staff=2-900, founded=1975-2023, country=Japan|Vietnam|Sweden|Brazil|Poland|Korea""",
    """animals: name=nickname, age=1-30, food=seeds|fish|leaves|insects|roots|berries, cage_id>cages
       cages: cage=code, wing=north|south|river|forest|desert|night, temperature=5-40, guests=1-30""",
    """hotels: hotel=title, rooms=10-600, view=sea|city|garden|mountain|lake|river, rate=20-900, owner_id>owners
       owners: name=person, wealth=1-99, nation=Laos|Peru|Kenya|Spain|Japan|Egypt""",
    """lessons: lesson=title, length=10-180, instrument=piano|violin|drums|flute|cello, fee=5-200, tutor_id>tutors
       tutors: tutor=person, reviews=0-300, accent=British|Irish|Scottish|Welsh|Aussie|Kiwi""",
)

UNSEEN_DOMAINS = (
    """patients: fullname=person, pulse=45-160, ward=cardiac|surgery|burns|children|eye|dental, doctor_id>doctors
       doctors: surname=nickname, shifts=1-31, specialty=oncology|pediatrics|urology|allergy|trauma|genetics""",
    """planets: callsign=nickname, moons=0-90, climate=icy|toxic|arid|stormy|oceanic|molten, galaxy_id>galaxies
       galaxies: catalog=title, brightness=5-500, shape=spiral|ring|lens|dwarf|elliptic|irregular""",
    """vessels: shipname=title, tonnage=100-9900, cargo=rice|coffee|timber|steel|cotton|salt, harbor_id>harbors
       harbors: berth=code, depth=4-60, ocean=Pacific|Arctic|Indian|Atlantic|Southern|Baltic""",
    """paintings: caption=title, worth=100-99000, technique=oil|fresco|ink|lacquer|collage|pastel, gallery_id>galleries
       galleries: venue=nickname, entrance=3-45, curator=Amélie|Quỳnh|Rashid|Ingrid|Khôi|Bianca, square=120-7000""",
    """phones: handset=code, battery=900-7000, finish=matte|glossy|bamboo|ceramic|denim|copper, vendor_id>vendors
       vendors: merchant=person, warranty=3-48, province=Cần Thơ|Quảng Nam|Ontario|Bohemia|Lombardy|Alberta""",
    """farms: estate=title, acres=4-900, crop=maize|barley|peanut|cassava|pepper|mango, grower_id>growers
       growers: planter=person, tractors=1-25, valley=Loire|Mekong|Indus|Rhine|Douro|Yangtze
       barns: tag=code, stalls=6-140, farm_id>farms""",
    """wines: bottle=nickname, vintage=1950-2023, grape=merlot|malbec|riesling|syrah|gamay|muscat, cellar_id>cellars
       cellars: vault=title, barrels=12-800, soil=chalk|granite|loam|slate|gravel|basalt""",
    """robots: serial=code, torque=10-990, task=welding|sorting|cleaning|lifting|mapping|milling, lab_id>labs
       labs: bench=nickname, payroll=500-90000, campus=Zurich|Delft|Pune|Osaka|Tampere|Haifa""",
)

SCHEMA_WORDS = """
abbey account acorn action actor address advice agent aisle alarm amber anchor angle ankle answer antler anvil apple
apron arch army arrow artist atlas attic autumn bacon badge bag baker balcony ball bandage bank banner barrel basil
basin basket bay beach beacon beam bean bear beaver bed bell belt bench berry bill bird bishop blade blanket blaze
block blossom board boat body bolt bone bonnet bonus booth border bottle boulder bowl box bracket brain branch brand
bread breeze brewer brick bride bronze broom bruise brush bubble bucket buckle bud buffalo bulb burden bus butcher
butter button cabbage cabin cable cactus cake call camel camp canal candle candy canyon cap captain card carpet carrot
castle cat cattle cause cave cell cement center cereal chain chair chance change channel chapel charge chart cherry
chest chimney choice church cinema circle citizen claim class clay clerk cliff clinic clock cloth cloud clover cluster
coach coal coast coat coconut coin collar colony comet comment compass concert contract cook copy coral corn corner
costume cottage council count couple courier court cover cow cradle crater creek crew cricket cross crown crystal cup
cure curve cushion cycle daisy dance dancer date day deal debt degree demand desert design detail device diamond diary
diet dinner doll door dose draft dragon drawer dream dress drink driver drum duty eagle ear earth easel echo edge
effect effort egg elbow elder ember emperor engine envelope error essay event exam exit fabric face fact fair falcon
family fan fault feast feather feature feeling fence festival fever fiddle field figure finger fire flag flame flavor
fleece flower flute fold force forest forge fork form fossil fountain fox frame fridge friend frost fruit fuel fund
gap garlic gas gate gear gem ghost giant gift ginger glacier glass glove goal goat gold goose grain growth guard guest
guide guitar gun habit hall hamlet hammer hand harness hat hazel heart heat heel helmet herb hill hint hive hole honor
hook horn horse host hunter ice idea image inch income inn iron item ivory ivy jacket jar jewel job joint joke journey
judge juice jungle kettle key kick king kitchen kite knee knife knot label ladder lagoon lake lamp land lantern law
lawyer layer leader leaf leg lemon lender letter link lion list loan lock lodge log loss lot luck lumber machine
magnet mail mantle map marble mark market mask mate meadow meal measure meat medal meeting member memory mentor menu
metal meter mile milk mill mind mine miner mint mirage mirror model module mole money monk month moon mosaic moss
motel motor mouse mouth muffin mural muscle mustard nail neck nerve nest net news nickel node noise nomad note notice
novel nugget number nurse oasis object offer office oil olive onion option orchard organ otter oven oyster paddle page
pain paint pair palace palm pan panda paper parcel parent parrot part party passage pastry path pattern payment peach
peak pearl pebble pen penny pet phase phrase pie piece pig pigeon pillow pilot pin pipe pirate place plan plant plate
plot plum pocket poem point pole pond pony pool poppy porch post pot potato prairie prayer present prison prize profit
proof pump puppet purse quarry queen quest quill quilt rabbit radio rail rain range rank rate raven reader reason
recipe record reef reply report request result ribbon riddle ridge rifle ring risk road robin rock rocket role roof
root rope rose ruby rule saddle sail salad sale salmon sample sandal scale scarf scene school scout screen sea season
seat seed sense shade shaft share sheep sheet shelf shell shield ship shoe shop shore shoulder shower shrimp shrine
sign signal silk singer sink site size skill skin skirt skull sled slice slope smell smile smoke snail snake snow soap
sock sofa soldier soup source spade spark sparrow speech spell spice spider spirit spoon spot spring spruce squad
stable stage stair stamp stand state statue stem step stick stitch stock stone store storm story stove stream strike
string suit summer summit sun swan sword symbol tail tailor tale tank tape target tavern tax tea tear temple tent term
test text theory thing thorn thread throat ticket tide tiger tile time tin tip toad toe tomato tone tongue tooth torch
touch towel tower town toy trace trade trail tray treaty trench trick trip truck trumpet trunk truth tube tulip tune
tunnel turkey turn turtle twin type umbrella uncle unit user vase velvet verse video village violin visit voice
volcano vote voyager wage wagon walk wall wallet walnut war warrior wasp watch water wave wax way weaver web week
whale wheat wheel whip whistle wife wind wire wish witness wizard wolf wood wool work worker wound wreath wrist writer
yacht yard yarn yeast zebra zinc
"""

SYLLABLES = """
ba be bi bo bu ca ce co cu da de di do du fa fe fi fo ga ge go gu ha he hi ho ja jo ka ke ki ko la le li lo lu ma me
mi mo mu na ne ni no nu pa pe pi po ra re ri ro ru sa se si so su ta te ti to tu va ve vi vo wa we wi xa ya yo za zo
bar bel bin cam cor dan den dor fin fur gan ger hol jan kel kin lan len lin lor man mel mir mon nal nor pan per pol
ran ril ron sal sen sil tan tel tor val ven vor wen win zan
"""

ENDINGS = ("", "", "", "x", "n", "m", "t", "d", "l", "th", "st", "ng")
